// Command render does what `helm template` and `helm lint` do, with Helm's own packages, for many charts, values and
// Kubernetes versions in one run: a process for each of them would take minutes.
//
// It reads a JSON list of requests from standard input and writes a JSON list of answers in the same order. A fault of a
// chart is part of its answer; the exit status is not zero only if the requests cannot be read.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
)

type request struct {
	// Directory or archive of the chart.
	Chart       string         `json:"chart"`
	Release     string         `json:"release"`
	Namespace   string         `json:"namespace"`
	KubeVersion string         `json:"kubeVersion"`
	Values      map[string]any `json:"values"`
	// Also run the linter.
	Lint bool `json:"lint"`
}

type answer struct {
	// Rendered templates by their path in the chart.
	Files map[string]string `json:"files,omitempty"`
	// Warnings and errors of the linter.
	Messages []string `json:"messages,omitempty"`
	Error    string   `json:"error,omitempty"`
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		fmt.Fprintf(os.Stderr, "cannot read requests: %v\n", err)
		os.Exit(1)
	}
	answers := make([]answer, len(requests))
	for i, request := range requests {
		files, messages, err := render(request)
		answers[i] = answer{Files: files, Messages: messages}
		if err != nil {
			answers[i].Error = err.Error()
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		fmt.Fprintf(os.Stderr, "cannot write answers: %v\n", err)
		os.Exit(1)
	}
}

func render(request request) (map[string]string, []string, error) {
	version, err := chartutil.ParseKubeVersion(request.KubeVersion)
	if err != nil {
		return nil, nil, err
	}
	// Each step below may change the chart and its values, so each request loads its own.
	loaded, err := loader.Load(request.Chart)
	if err != nil {
		return nil, nil, err
	}
	var messages []string
	if request.Lint {
		linter := lint.AllWithKubeVersion(request.Chart, request.Values, request.Namespace, version)
		for _, message := range linter.Messages {
			// The only message of the information level asks for an icon.
			if message.Severity > support.InfoSev {
				messages = append(messages, message.Error())
			}
		}
	}
	if loaded.Metadata.KubeVersion != "" && !chartutil.IsCompatibleRange(loaded.Metadata.KubeVersion, version.String()) {
		return nil, messages, fmt.Errorf("%s is for Kubernetes %s, not for %s", loaded.Name(), loaded.Metadata.KubeVersion, version)
	}
	if err := chartutil.ProcessDependenciesWithMerge(loaded, request.Values); err != nil {
		return nil, messages, err
	}
	capabilities := chartutil.DefaultCapabilities.Copy()
	capabilities.KubeVersion = *version
	options := chartutil.ReleaseOptions{Name: request.Release, Namespace: request.Namespace, Revision: 1, IsInstall: true}
	values, err := chartutil.ToRenderValues(loaded, request.Values, options, capabilities)
	if err != nil {
		return nil, messages, err
	}
	files, err := engine.Render(loaded, values)
	return files, messages, err
}
