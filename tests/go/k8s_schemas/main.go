// Command k8s_schemas validates manifests for a Kubernetes version: it finds unknown fields, missing fields, wrong types and
// wrong constants.
//
//	k8s_schemas OPENAPI API... < requests.json > answers.json
//
// OPENAPI is a directory of OpenAPI v3 documents, <minor>/apis/<group>/<version>.json, as API servers publish them. Each
// API is MINOR=DIRECTORY:DIRECTORY, the sources of k8s.io/api and k8s.io/apimachinery of that version: the Go types that
// those documents are generated from. Every object is validated with both if both exist.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strconv"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/text/language"
	"golang.org/x/text/message"
	"sigs.k8s.io/yaml"
)

type request struct {
	Name        string `json:"name"`
	KubeVersion string `json:"kubeVersion"` // such as 1.30
	Text        string `json:"text"`        // YAML documents
	CRDs        string `json:"crds"`        // YAML documents: CustomResourceDefinitions that the cluster has
}

type answer struct {
	Objects  int      `json:"objects"`
	OpenAPI  int      `json:"openapi"` // objects that were validated with an OpenAPI document of this version
	Types    int      `json:"types"`   // with Go types of this version
	CRDs     int      `json:"crds"`    // with a custom resource definition
	Problems []string `json:"problems"`
}

// A source returns the schema of a kind, or nil if it does not know the kind.
type source interface {
	schema(group, version, kind string) (*jsonschema.Schema, error)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) < 3 {
		return fmt.Errorf("usage: k8s_schemas OPENAPI MINOR=DIRECTORY:DIRECTORY... < requests.json")
	}
	openAPI := map[string]*openAPISource{}
	entries, err := os.ReadDir(os.Args[1])
	if err != nil {
		return err
	}
	for _, entry := range entries {
		openAPI[entry.Name()] = newOpenAPISource(os.Args[1] + "/" + entry.Name())
	}
	types := map[string]*typesSource{}
	for _, argument := range os.Args[2:] {
		minor, directories, _ := strings.Cut(argument, "=")
		api, machinery, ok := strings.Cut(directories, ":")
		if !ok {
			return fmt.Errorf("%q is not MINOR=DIRECTORY:DIRECTORY", argument)
		}
		number, err := strconv.Atoi(strings.TrimPrefix(minor, "1."))
		if err != nil {
			return fmt.Errorf("%q: %w", argument, err)
		}
		types[minor] = newTypesSource(number, api, machinery)
	}
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		return err
	}
	answers := make([]answer, len(requests))
	for i, request := range requests {
		if answers[i], err = validateRequest(request, openAPI, types); err != nil {
			return fmt.Errorf("%s: %w", request.Name, err)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

func validateRequest(request request, openAPI map[string]*openAPISource, types map[string]*typesSource) (answer, error) {
	result := answer{Problems: []string{}}
	objects, err := documents(request.Text)
	if err != nil {
		result.Problems = append(result.Problems, err.Error())
		return result, nil
	}
	crds, err := newCRDSource(request.CRDs)
	if err != nil {
		return result, err
	}
	for _, object := range objects {
		result.Objects++
		apiVersion, _ := object["apiVersion"].(string)
		kind, _ := object["kind"].(string)
		group, version, ok := strings.Cut(apiVersion, "/")
		if !ok {
			group, version = "", apiVersion
		}
		known := false
		try := func(from source, count *int) error {
			schema, err := from.schema(group, version, kind)
			if err != nil || schema == nil {
				return err
			}
			known = true
			*count++
			for _, problem := range validate(schema, object) {
				result.Problems = append(result.Problems, fmt.Sprintf("%s %s%s", kind, nameOf(object), problem))
			}
			return nil
		}
		if found := openAPI[request.KubeVersion]; found != nil {
			if err := try(found, &result.OpenAPI); err != nil {
				return result, err
			}
		}
		if found := types[request.KubeVersion]; found != nil {
			if err := try(found, &result.Types); err != nil {
				return result, err
			}
		}
		if err := try(crds, &result.CRDs); err != nil {
			return result, err
		}
		// Definitions of custom resources are not among the types of k8s.io/api. Their API is v1 since 1.16, so versions
		// without a document use the oldest or the newest one.
		if !known && group == "apiextensions.k8s.io" {
			if err := try(nearest(openAPI, request.KubeVersion), &result.OpenAPI); err != nil {
				return result, err
			}
		}
		if !known {
			result.Problems = append(result.Problems, fmt.Sprintf("%s %s: Kubernetes %s knows no %s of %s", kind, nameOf(object), request.KubeVersion, kind, apiVersion))
		}
	}
	return result, nil
}

func nearest(openAPI map[string]*openAPISource, minor string) *openAPISource {
	minors := make([]string, 0, len(openAPI))
	for known := range openAPI {
		minors = append(minors, known)
	}
	sort.Strings(minors) // 1.23 to 1.99: two-digit minors sort as strings like numbers
	if minor < minors[0] {
		return openAPI[minors[0]]
	}
	return openAPI[minors[len(minors)-1]]
}

func nameOf(object map[string]any) string {
	metadata, _ := object["metadata"].(map[string]any)
	name, _ := metadata["name"].(string)
	return name
}

// documents parses YAML like kubectl: YAML 1.1, without duplicate keys.
func documents(text string) ([]map[string]any, error) {
	var objects []map[string]any
	for _, document := range strings.Split("\n"+text, "\n---") {
		asJSON, err := yaml.YAMLToJSONStrict([]byte(document))
		if err != nil {
			return nil, err
		}
		decoded, err := jsonschema.UnmarshalJSON(bytes.NewReader(asJSON))
		if err != nil {
			return nil, err
		}
		if decoded == nil {
			continue
		}
		object, ok := decoded.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("a document is not an object")
		}
		objects = append(objects, object)
	}
	return objects, nil
}

// validate returns a text for each violation of the schema.
func validate(schema *jsonschema.Schema, object map[string]any) []string {
	err := schema.Validate(object)
	if err == nil {
		return nil
	}
	invalid, ok := err.(*jsonschema.ValidationError)
	if !ok {
		return []string{": " + err.Error()}
	}
	printer := message.NewPrinter(language.English)
	var problems []string
	var walk func(*jsonschema.ValidationError)
	walk = func(cause *jsonschema.ValidationError) {
		if len(cause.Causes) == 0 {
			problems = append(problems, fmt.Sprintf(" at /%s: %s", strings.Join(cause.InstanceLocation, "/"), cause.ErrorKind.LocalizedString(printer)))
		}
		for _, deeper := range cause.Causes {
			walk(deeper)
		}
	}
	walk(invalid)
	return problems
}

// strict makes a schema reject fields that it does not name, as the API server does for kubectl.
func strict(schema any) {
	switch node := schema.(type) {
	case map[string]any:
		_, hasProperties := node["properties"].(map[string]any)
		_, hasOthers := node["additionalProperties"]
		if hasProperties && !hasOthers && node["x-kubernetes-preserve-unknown-fields"] != true {
			node["additionalProperties"] = false
		}
		// Kubernetes 1.23 still declares these as strings.
		if node["format"] == "int-or-string" {
			delete(node, "type")
		}
		for _, child := range node {
			strict(child)
		}
	case []any:
		for _, child := range node {
			strict(child)
		}
	}
}
