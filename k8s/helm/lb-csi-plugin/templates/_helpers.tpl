{{/* The Kubernetes version to render for. */}}
{{- define "lbcsi.kube" -}}
{{ .Values.kubeVersion | default .Capabilities.KubeVersion.Version }}
{{- end }}

{{/* "true" when Kubernetes is at least a version: list of root and version. */}}
{{- define "lbcsi.since" -}}
{{- if semverCompare (printf ">=%s.0-0" (index . 1)) (include "lbcsi.kube" (index . 0)) }}true{{ end }}
{{- end }}

{{/* Image of a sidecar: list of root and name. */}}
{{- define "lbcsi.sidecar" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $version := "" -}}
{{- range $root.Files.Get "sidecars.yaml" | fromYamlArray -}}
{{- if include "lbcsi.since" (list $root .since) -}}
{{- $version = get . $name -}}
{{- end -}}
{{- end -}}
{{- get $root.Values.sidecarImages $name | default (printf "%s/sig-storage/%s:%s" $root.Values.sidecarImageRegistry $name $version) -}}
{{- end }}

{{- define "lbcsi.driver" -}}csi.lightbitslabs.com{{- end }}

{{- define "lbcsi.image" -}}
{{ with .Values.imageRegistry }}{{ . }}/{{ end }}{{ .Values.image }}
{{- end }}

{{/* Labels of everything; those of pods, by which controllers find them, never change: list of root and role. */}}
{{- define "lbcsi.labels" -}}
app: lb-csi-plugin
{{- end }}
{{- define "lbcsi.podLabels" -}}
app: lb-csi-plugin
role: {{ index . 1 }}
{{- end }}

{{- define "lbcsi.controllerKind" -}}
{{ .Values.controllerKind | default (ternary "Deployment" "StatefulSet" (eq "true" (include "lbcsi.since" (list . "1.25")))) }}
{{- end }}
{{- define "lbcsi.leaderElection" -}}
{{ if eq "Deployment" (include "lbcsi.controllerKind" .) }}true{{ end }}
{{- end }}

{{/* A toleration, or several, as a list. */}}
{{- define "lbcsi.tolerations" -}}
{{- if kindIs "map" . -}}
{{- list . | toYaml -}}
{{- else -}}
{{- toYaml . -}}
{{- end -}}
{{- end }}

{{/* Where a pod gets the right to pull from. */}}
{{- define "lbcsi.pullSecrets" -}}
{{- if or .Values.imagePullSecrets .Values.registryUsername }}
imagePullSecrets:
{{- range .Values.imagePullSecrets }}
  - name: {{ . }}
{{- end }}
{{- if .Values.registryUsername }}
  - name: lb-csi-registry-override-regcred
{{- end }}
{{- end }}
{{- end }}

{{- define "lbcsi.seccomp" -}}
{{- if include "lbcsi.since" (list . "1.19") }}
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- end }}

{{/* For containers that only talk: to the API server, or over a socket. */}}
{{- define "lbcsi.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Environment that both halves of the driver have. */}}
{{- define "lbcsi.environment" -}}
- name: LB_CSI_LOG_LEVEL
  value: {{ .Values.logLevel }}
- name: LB_CSI_LOG_FMT
  value: {{ .Values.logFormat }}
- name: LB_CSI_DEFAULT_FS
  value: {{ .Values.defaultFsType }}
- name: LB_CSI_NODE_ID_SUFFIX
  value: {{ .Values.nodeIdSuffix | quote }}
{{- if .Values.volumeHealth }}
- name: LB_CSI_1_13
  value: "true"
{{- end }}
{{- end }}

{{/* A probe of an HTTP endpoint: dict of port and, on the host's network, host. */}}
{{- define "lbcsi.probe" -}}
livenessProbe:
  httpGet:
    path: /healthz
    port: {{ .port }}
    {{- with .host }}
    host: {{ . }}
    {{- end }}
  initialDelaySeconds: 10
  periodSeconds: 30
  timeoutSeconds: 5
  failureThreshold: 5
{{- end }}

{{/* A sidecar of the controller: dict of root, name, args and, for those that must find their own pod, owner. */}}
{{- define "lbcsi.controllerSidecar" -}}
- name: {{ .name }}
  image: {{ include "lbcsi.sidecar" (list .root .name) }}
  imagePullPolicy: {{ .root.Values.imagePullPolicy }}
  args:
    - --csi-address=/csi/csi.sock
    {{- range .args }}
    - {{ . }}
    {{- end }}
    {{- if include "lbcsi.leaderElection" .root }}
    - --leader-election
    {{- end }}
    - --v={{ .root.Values.sidecarLogLevel }}
  {{- if .owner }}
  env:
    - name: NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
    - name: POD_NAME
      valueFrom:
        fieldRef:
          fieldPath: metadata.name
  {{- end }}
  securityContext:
    {{- include "lbcsi.unprivileged" .root | nindent 4 }}
  resources:
    {{- toYaml .root.Values.sidecarResources | nindent 4 }}
  volumeMounts:
    - name: socket-dir
      mountPath: /csi
{{- end }}

{{/* Rules to read the Secrets that classes refer to. Sidecars get them by name, so they need not list. */}}
{{- define "lbcsi.secretRule" -}}
- apiGroups: [""]
  resources: [secrets]
  {{- with .Values.secretNames }}
  resourceNames:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  verbs: [get]
{{- end }}

{{/*
Rights of a sidecar: dict of root, role, binding, rules and, for those that elect a leader, leaderRole and leaderBinding
with more rules in leaderRules. The names are those of the vendor's driver: bindings cannot be changed to another role,
and what is left of an older installation shall not go on giving rights.
*/}}
{{- define "lbcsi.rights" -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ .role }}
  labels:
    {{- include "lbcsi.labels" .root | nindent 4 }}
rules:
  {{- .rules | trim | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ .binding }}
  labels:
    {{- include "lbcsi.labels" .root | nindent 4 }}
subjects:
  - kind: ServiceAccount
    name: {{ .root.Values.controllerServiceAccountName }}
    namespace: {{ .root.Release.Namespace }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ .role }}
{{- $leader := include "lbcsi.leaderElection" .root }}
{{- if or $leader .leaderRules }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ .leaderRole }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "lbcsi.labels" .root | nindent 4 }}
rules:
  {{- if $leader }}
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    verbs: [get, list, watch, create, update, delete]
  {{- end }}
  {{- with .leaderRules }}
  {{- trim . | nindent 2 }}
  {{- end }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .leaderBinding }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "lbcsi.labels" .root | nindent 4 }}
subjects:
  - kind: ServiceAccount
    name: {{ .root.Values.controllerServiceAccountName }}
    namespace: {{ .root.Release.Namespace }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .leaderRole }}
{{- end }}
{{ end }}
