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

{{/* The names and defaults of the storage backend, as YAML: see backends.yaml. */}}
{{- define "lbcsi.backend" -}}
{{- get (.Files.Get "backends.yaml" | fromYaml) .Values.backend | toYaml -}}
{{- end }}
{{- define "lbcsi.controllerAccount" -}}
{{ .Values.controllerServiceAccountName | default (include "lbcsi.backend" . | fromYaml).controllerAccount }}
{{- end }}
{{- define "lbcsi.nodeAccount" -}}
{{ .Values.nodeServiceAccountName | default (include "lbcsi.backend" . | fromYaml).nodeAccount }}
{{- end }}
{{- define "lbcsi.attach" -}}
{{ .Values.attach | default (include "lbcsi.backend" . | fromYaml).attach }}
{{- end }}

{{/* "true" if the feature is enabled and the driver supports it with this backend. */}}
{{- define "lbcsi.snapshots" -}}
{{ if and .Values.enableSnapshot (eq .Values.backend "lightos") }}true{{ end }}
{{- end }}
{{- define "lbcsi.resizer" -}}
{{- if .Values.enableExpandVolume }}
{{- if eq .Values.backend "lightos" }}true
{{- /*
PoseidonOS supports changing attributes, but not expansion. Resizers before 2.0 exit if the driver has no expansion; later
ones ask the controller for the node service's capabilities, and accept that it has none.
*/}}
{{- else if include "lbcsi.since" (list . "1.34") }}true{{ end }}
{{- end }}
{{- end }}

{{- define "lbcsi.image" -}}
{{ with .Values.imageRegistry }}{{ . }}/{{ end }}{{ .Values.image }}
{{- end }}
{{- define "lbcsi.controllerImage" -}}
{{ with .Values.imageRegistry }}{{ . }}/{{ end }}{{ .Values.controllerImage | default .Values.image }}
{{- end }}

{{/* "true" if sidecars use VolumeAttributesClasses: always since Kubernetes 1.34, before that with a feature gate. */}}
{{- define "lbcsi.attributesGate" -}}
{{- if and .Values.volumeAttributesClassGate (not (include "lbcsi.since" (list . "1.34"))) }}
{{- if not (include "lbcsi.since" (list . "1.31")) }}{{ fail "volumeAttributesClassGate needs Kubernetes 1.31" }}{{ end -}}
true
{{- end }}
{{- end }}
{{- define "lbcsi.attributes" -}}
{{ if or (include "lbcsi.since" (list . "1.34")) (include "lbcsi.attributesGate" .) }}true{{ end }}
{{- end }}

{{/* Labels of all objects. Those of pods must never change, because selectors use them. */}}
{{- define "lbcsi.labels" -}}
app: {{ (include "lbcsi.backend" . | fromYaml).app }}
{{- end }}
{{- define "lbcsi.controllerLabels" -}}
{{ (include "lbcsi.backend" . | fromYaml).controllerLabels | toYaml }}
{{- end }}
{{- define "lbcsi.nodeLabels" -}}
{{ (include "lbcsi.backend" . | fromYaml).nodeLabels | toYaml }}
{{- end }}

{{- define "lbcsi.controllerKind" -}}
{{- if eq .Values.backend "poseidon" -}}
{{- if eq .Values.controllerKind "Deployment" }}{{ fail "controllerKind Deployment is for LightOS: PoseidonOS takes one change at a time, from one controller" }}{{ end -}}
StatefulSet
{{- else -}}
{{ .Values.controllerKind | default (ternary "Deployment" "StatefulSet" (eq "true" (include "lbcsi.since" (list . "1.25")))) }}
{{- end -}}
{{- end }}
{{- define "lbcsi.leaderElection" -}}
{{ if eq "Deployment" (include "lbcsi.controllerKind" .) }}true{{ end }}
{{- end }}

{{/* One or several tolerations as a list. */}}
{{- define "lbcsi.tolerations" -}}
{{- if kindIs "map" . -}}
{{- list . | toYaml -}}
{{- else -}}
{{- toYaml . -}}
{{- end -}}
{{- end }}

{{/* The Secrets with which a pod pulls its images. */}}
{{- define "lbcsi.pullSecrets" -}}
{{- if or .Values.imagePullSecrets .Values.registryUsername }}
imagePullSecrets:
{{- range .Values.imagePullSecrets }}
  - name: {{ . }}
{{- end }}
{{- if .Values.registryUsername }}
  - name: {{ (include "lbcsi.backend" . | fromYaml).pullSecret }}
{{- end }}
{{- end }}
{{- end }}

{{- define "lbcsi.seccomp" -}}
{{- if include "lbcsi.since" (list . "1.19") }}
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- end }}

{{/* For containers that only communicate, with the API server or over a socket. */}}
{{- define "lbcsi.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Environment of both the controller and the node service. */}}
{{- define "lbcsi.environment" -}}
- name: LB_CSI_BACKEND
  value: {{ .Values.backend }}
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

{{/* Further options: a map of environment variables. */}}
{{- define "lbcsi.options" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ ternary (int64 $value) $value (kindIs "float64" $value) | quote }}
{{- end }}
{{- end }}

{{/* The address of the metrics: the environment of a container (dict of port and variable), and its port (port and name). */}}
{{- define "lbcsi.metricsEnvironment" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: {{ .variable }}
  value: $(POD_IP):{{ .port }}
{{- end }}
{{- define "lbcsi.metricsPort" -}}
ports:
  - name: {{ .name }}
    containerPort: {{ .port }}
{{- end }}
{{/* For collectors that discover pods by annotations. */}}
{{- define "lbcsi.metricsAnnotations" -}}
prometheus.io/scrape: "true"
prometheus.io/port: {{ . | quote }}
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
    - --csi-address=/csi/lbcsi/csi.sock
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

{{/* Rules to read the Secrets that classes refer to. Sidecars get them by name and need no list. PoseidonOS uses no Secrets. */}}
{{- define "lbcsi.secretRule" -}}
{{- if eq .Values.backend "lightos" -}}
- apiGroups: [""]
  resources: [secrets]
  {{- with .Values.secretNames }}
  resourceNames:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  verbs: [get]
{{- end }}
{{- end }}

{{/*
Environment, mounts and volumes of containers that call the management API: the cluster file, certificates and the token.
*/}}
{{- define "lbcsi.hasConfig" -}}
{{ if or .Values.clusters .Values.systems .Values.mgmtCa .Values.caFiles }}true{{ end }}
{{- end }}
{{/* Name of a token's file: list of its index in jwtSecret, and the entry. */}}
{{- define "lbcsi.tokenFile" -}}
{{ (index . 1).file | default (ternary "jwt" (index . 1).name (eq (index . 0) 0)) }}
{{- end }}
{{/* Fails if clusters name a file that a pod does not have: dict of root, pod, and mounts (its extra ones). */}}
{{- define "lbcsi.checkFiles" -}}
{{- $files := list }}
{{- range $at, $secret := .root.Values.jwtSecret }}
{{- $file := printf "/etc/lb-csi/%s" (include "lbcsi.tokenFile" (list $at $secret)) }}
{{- if has $file $files }}{{ fail (printf "jwtSecret %s: another entry is %s already, give it another file" $secret.name $file) }}{{ end }}
{{- $files = append $files $file }}
{{- end }}
{{- if .root.Values.mgmtCa }}{{ $files = append $files "/etc/lb-csi-config/ca.pem" }}{{ end }}
{{- range $name, $_ := .root.Values.caFiles }}{{ $files = append $files (printf "/etc/lb-csi-config/%s" $name) }}{{ end }}
{{- $pod := .pod }}
{{- $mounts := .mounts }}
{{- range $cluster := .root.Values.clusters }}
{{- range $key, $value := dict "jwt" "jwtSecret (as its file)" "ca" "caFiles" }}
{{- with get $cluster $key }}
{{- $path := . }}
{{- $isThere := has $path $files }}
{{- range $mounts }}{{ if hasPrefix (printf "%s/" (trimSuffix "/" .mountPath)) $path }}{{ $isThere = true }}{{ end }}{{ end }}
{{- if not $isThere }}
{{- fail (printf "clusters %s: the %s pod has no file %s, which %s names; add it to %s, or mount it with %sExtraVolumes and %sExtraVolumeMounts" $cluster.name $pod $path $key $value $pod $pod) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- define "lbcsi.managementEnvironment" -}}
{{- if or .Values.clusters .Values.systems }}
- name: LB_CSI_CONFIG
  value: /etc/lb-csi-config/clusters.yaml
{{- end }}
{{- if .Values.mgmtCa }}
- name: LB_CSI_MGMT_CA
  value: /etc/lb-csi-config/ca.pem
{{- end }}
{{- if not .Values.mgmtTlsVerify }}
- name: LB_CSI_MGMT_TLS_VERIFY
  value: "false"
{{- end }}
{{- end }}
{{- define "lbcsi.managementMounts" -}}
{{- if .Values.jwtSecret }}
- name: jwt
  mountPath: /etc/lb-csi
  readOnly: true
{{- end }}
{{- if include "lbcsi.hasConfig" . }}
- name: config
  mountPath: /etc/lb-csi-config
  readOnly: true
{{- end }}
{{- end }}
{{- define "lbcsi.managementVolumes" -}}
{{- if .Values.jwtSecret }}
- name: jwt
  projected:
    # Only the pod's user and group can read it.
    defaultMode: 0440
    sources:
    {{- range $at, $secret := .Values.jwtSecret }}
      - secret:
          name: {{ $secret.name }}
          items:
            - key: jwt
              path: {{ include "lbcsi.tokenFile" (list $at $secret) }}
    {{- end }}
{{- end }}
{{- if include "lbcsi.hasConfig" . }}
- name: config
  configMap:
    name: {{ (include "lbcsi.backend" . | fromYaml).config }}
{{- end }}
{{- end }}

{{/* Roles and bindings of a sidecar: dict of root, name, rules and, if it needs more in its own namespace, leaderRules. */}}
{{- define "lbcsi.rights" -}}
{{- $backend := include "lbcsi.backend" .root | fromYaml }}
{{- $names := get $backend.rights .name }}
{{- if .root.Values.vendorRbacNames }}
{{- $names = get ($backend.vendorRights | default dict) .name | default $names }}
{{- end }}
{{- $role := index $names 0 }}
{{- $leaderRole := index $names 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ $role }}
  labels:
    {{- include "lbcsi.labels" .root | nindent 4 }}
rules:
  {{- .rules | trim | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ index $names 1 }}
  labels:
    {{- include "lbcsi.labels" .root | nindent 4 }}
subjects:
  - kind: ServiceAccount
    name: {{ include "lbcsi.controllerAccount" .root }}
    namespace: {{ .root.Release.Namespace }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ $role }}
{{- $leader := include "lbcsi.leaderElection" .root }}
{{- if or $leader .leaderRules }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ $leaderRole }}
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
  name: {{ index $names 3 }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "lbcsi.labels" .root | nindent 4 }}
subjects:
  - kind: ServiceAccount
    name: {{ include "lbcsi.controllerAccount" .root }}
    namespace: {{ .root.Release.Namespace }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ $leaderRole }}
{{- end }}
{{ end }}
