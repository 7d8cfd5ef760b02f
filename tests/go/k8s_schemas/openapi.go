package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"sigs.k8s.io/yaml"
)

// openAPISource has the OpenAPI documents that an API server of one version publishes.
type openAPISource struct {
	directory string
	compiler  *jsonschema.Compiler
	// URLs of the schemas in loaded documents, by "group/version kind".
	places map[string]string
	loaded map[string]bool
}

func newOpenAPISource(directory string) *openAPISource {
	return &openAPISource{
		directory: directory,
		compiler:  jsonschema.NewCompiler(),
		places:    map[string]string{},
		loaded:    map[string]bool{},
	}
}

func (from *openAPISource) schema(group, version, kind string) (*jsonschema.Schema, error) {
	path := fmt.Sprintf("%s/apis/%s/%s.json", from.directory, group, version)
	if group == "" {
		path = fmt.Sprintf("%s/api/%s.json", from.directory, version)
	}
	if !from.loaded[path] {
		from.loaded[path] = true
		if err := from.load(path); os.IsNotExist(err) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
	}
	place, ok := from.places[group+"/"+version+" "+kind]
	if !ok {
		return nil, nil
	}
	return from.compiler.Compile(place) // compiled once; later calls return the same schema
}

func (from *openAPISource) load(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	document, err := jsonschema.UnmarshalJSON(file)
	if err != nil {
		return err
	}
	strict(document)
	if err := from.compiler.AddResource(path, document); err != nil {
		return err
	}
	root, _ := document.(map[string]any)
	components, _ := root["components"].(map[string]any)
	schemas, _ := components["schemas"].(map[string]any)
	for name, schema := range schemas {
		fields, _ := schema.(map[string]any)
		kinds, _ := fields["x-kubernetes-group-version-kind"].([]any)
		// Several kinds: options of requests, which every group has.
		if len(kinds) != 1 {
			continue
		}
		kind, _ := kinds[0].(map[string]any)
		from.places[fmt.Sprintf("%v/%v %v", kind["group"], kind["version"], kind["kind"])] = path + "#/components/schemas/" + name
	}
	return nil
}

// crdSource has the schemas of custom resource definitions.
type crdSource struct{ schemas map[string]*jsonschema.Schema }

func newCRDSource(text string) (*crdSource, error) {
	from := &crdSource{schemas: map[string]*jsonschema.Schema{}}
	objects, err := documents(text)
	if err != nil {
		return nil, err
	}
	for _, object := range objects {
		if object["kind"] != "CustomResourceDefinition" {
			continue
		}
		var definition struct {
			Spec struct {
				Group    string                `json:"group"`
				Names    struct{ Kind string } `json:"names"`
				Versions []struct {
					Name   string `json:"name"`
					Served bool   `json:"served"`
					Schema struct {
						OpenAPIV3Schema map[string]any `json:"openAPIV3Schema"`
					} `json:"schema"`
				} `json:"versions"`
			} `json:"spec"`
		}
		encoded, err := yaml.Marshal(object)
		if err != nil {
			return nil, err
		}
		if err := yaml.Unmarshal(encoded, &definition); err != nil {
			return nil, err
		}
		for _, version := range definition.Spec.Versions {
			if !version.Served {
				continue
			}
			asJSON, err := yaml.Marshal(version.Schema.OpenAPIV3Schema)
			if err != nil {
				return nil, err
			}
			schemas, err := documents(string(asJSON))
			if err != nil {
				return nil, err
			}
			schema := schemas[0]
			if properties, ok := schema["properties"].(map[string]any); ok {
				// The API server validates these itself, whatever the definition says.
				for _, name := range []string{"apiVersion", "kind"} {
					properties[name] = map[string]any{"type": "string"}
				}
				properties["metadata"] = map[string]any{"type": "object"}
			}
			strict(schema)
			key := definition.Spec.Group + "/" + version.Name + " " + definition.Spec.Names.Kind
			url := "https://crd.invalid/" + strings.ReplaceAll(key, " ", "/")
			compiler := jsonschema.NewCompiler()
			if err := compiler.AddResource(url, schema); err != nil {
				return nil, err
			}
			if from.schemas[key], err = compiler.Compile(url); err != nil {
				return nil, err
			}
		}
	}
	return from, nil
}

func (from *crdSource) schema(group, version, kind string) (*jsonschema.Schema, error) {
	return from.schemas[group+"/"+version+" "+kind], nil
}
