{{- define "examples.since" -}}
{{- if semverCompare (printf ">=%s.0-0" (index . 1)) ((index . 0).Values.kubeVersion | default (index . 0).Capabilities.KubeVersion.Version) }}true{{ end }}
{{- end }}

{{- define "examples.snapshotApi" -}}
snapshot.storage.k8s.io/v1{{ if not (include "examples.since" (list . "1.20")) }}beta1{{ end }}
{{- end }}

{{/* Parameters that name the Secret for the sidecars; the node service needs no Secret. */}}
{{- define "examples.secrets" -}}
{{- range list "provisioner" "controller-publish" "controller-expand" }}
csi.storage.k8s.io/{{ . }}-secret-name: {{ $.Values.secretName }}
csi.storage.k8s.io/{{ . }}-secret-namespace: {{ $.Values.secretNamespace }}
{{- end }}
{{- end }}

{{/* A claim: dict of root, name, size and optionally class, mode, access, from (kind and name), attributes (a class). */}}
{{- define "examples.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
spec:
  storageClassName: {{ .class | default .root.Values.storageClassName }}
  accessModes:
    - {{ .access | default "ReadWriteOnce" }}
  volumeMode: {{ .mode | default "Filesystem" }}
  {{- with .attributes }}
  volumeAttributesClassName: {{ . }}
  {{- end }}
  {{- with .from }}
  dataSource:
    {{- if eq (first .) "VolumeSnapshot" }}
    apiGroup: snapshot.storage.k8s.io
    {{- end }}
    kind: {{ first . }}
    name: {{ last . }}
  {{- end }}
  resources:
    requests:
      storage: {{ .size }}
{{- end }}

{{/* A script that writes a file and its checksum, and then keeps the volume in use. */}}
{{- define "examples.script" -}}
- |
  cd /mnt/test && ls -l && date >> dates && sha256sum dates | tee dates.sha256
  trap 'exit 0' TERM; sleep 2147483647 & wait
{{- end }}

{{/* A pod that uses a claim: dict of root, name, claim and, for a block device, device. */}}
{{- define "examples.pod" -}}
apiVersion: v1
kind: Pod
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace }}
spec:
  containers:
    - name: busybox
      image: {{ .root.Values.podImage }}
      command: [sh, -c]
      args:
        {{- if .device }}
        - |
          # The first and the last byte that can be read.
          head -c 1 {{ .device }} | od -c && tail -c 1 {{ .device }} | od -c
          trap 'exit 0' TERM; sleep 2147483647 & wait
        {{- else }}
        {{- include "examples.script" . | nindent 8 }}
        {{- end }}
      {{- if .device }}
      volumeDevices:
        - name: test
          devicePath: {{ .device }}
      {{- else }}
      volumeMounts:
        - name: test
          mountPath: /mnt/test
      {{- end }}
  volumes:
    - name: test
      persistentVolumeClaim:
        claimName: {{ .claim }}
{{- end }}
