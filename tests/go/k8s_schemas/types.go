package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// typesSource parses the Go types of one Kubernetes version. It does not compile them, because that takes many minutes for
// twenty versions.
type typesSource struct {
	minor     int    // of Kubernetes 1
	api       string // directory of k8s.io/api
	machinery string // directory of k8s.io/apimachinery
	packages  map[string]*goPackage
	schemas   map[string]*jsonschema.Schema
}

type goPackage struct {
	types     map[string]*ast.TypeSpec
	imports   map[string]map[string]string // by file position's name: alias to import path
	fileOf    map[string]string            // type to file
	constants map[string][]any             // values of constants by the name of their type
	removed   map[string]int               // minor version that stopped serving a kind whose type still exists
}

func newTypesSource(minor int, api, machinery string) *typesSource {
	return &typesSource{minor: minor, api: api, machinery: machinery, packages: map[string]*goPackage{}, schemas: map[string]*jsonschema.Schema{}}
}

// Groups whose package is not named after the first part of the group.
var packageOf = map[string]string{"": "core"}

func (from *typesSource) schema(group, version, kind string) (*jsonschema.Schema, error) {
	key := group + "/" + version + " " + kind
	if found, ok := from.schemas[key]; ok {
		return found, nil
	}
	name, _, _ := strings.Cut(group, ".")
	if known, ok := packageOf[group]; ok {
		name = known
	}
	importPath := "k8s.io/api/" + name + "/" + version
	loaded, err := from.load(importPath)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	removed, isRemoved := loaded.removed[kind]
	if loaded.types[kind] == nil || isRemoved && removed <= from.minor {
		return nil, nil
	}
	definitions := map[string]any{}
	reference, err := from.named(importPath, kind, definitions)
	if err != nil {
		return nil, err
	}
	url := "https://types.invalid/" + importPath + "/" + kind
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource(url, map[string]any{"allOf": []any{reference}, "$defs": definitions}); err != nil {
		return nil, err
	}
	compiled, err := compiler.Compile(url)
	from.schemas[key] = compiled
	return compiled, err
}

func (from *typesSource) load(importPath string) (*goPackage, error) {
	if found := from.packages[importPath]; found != nil {
		return found, nil
	}
	directory := filepath.Join(from.api, strings.TrimPrefix(importPath, "k8s.io/api/"))
	if rest, ok := strings.CutPrefix(importPath, "k8s.io/apimachinery/"); ok {
		directory = filepath.Join(from.machinery, rest)
	}
	entries, err := os.ReadDir(directory)
	if err != nil {
		return nil, err
	}
	loaded := &goPackage{
		types:     map[string]*ast.TypeSpec{},
		imports:   map[string]map[string]string{},
		fileOf:    map[string]string{},
		constants: map[string][]any{},
		removed:   map[string]int{},
	}
	for _, entry := range entries {
		name := entry.Name()
		lifecycle := name == "zz_generated.prerelease-lifecycle.go"
		generated := strings.HasPrefix(name, "zz_") || strings.HasPrefix(name, "generated.")
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || generated && !lifecycle {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(directory, name), nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		loaded.imports[name] = map[string]string{}
		for _, imported := range file.Imports {
			target, _ := strconv.Unquote(imported.Path.Value)
			alias := path.Base(target)
			if imported.Name != nil {
				alias = imported.Name.Name
			}
			loaded.imports[name][alias] = target
		}
		for _, declaration := range file.Decls {
			if function, ok := declaration.(*ast.FuncDecl); ok {
				if kind, minor, ok := removal(function); ok {
					loaded.removed[kind] = minor
				}
				continue
			}
			general, ok := declaration.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range general.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					loaded.types[spec.Name.Name] = spec
					loaded.fileOf[spec.Name.Name] = name
				case *ast.ValueSpec:
					kind, ok := spec.Type.(*ast.Ident)
					if !ok || general.Tok != token.CONST {
						continue
					}
					for _, value := range spec.Values {
						literal, ok := value.(*ast.BasicLit)
						if !ok || literal.Kind != token.STRING {
							continue
						}
						text, _ := strconv.Unquote(literal.Value)
						loaded.constants[kind.Name] = append(loaded.constants[kind.Name], text)
					}
				}
			}
		}
	}
	from.packages[importPath] = loaded
	return loaded, nil
}

// Types with their own JSON encoding.
var special = map[string]any{
	"k8s.io/apimachinery/pkg/api/resource.Quantity": map[string]any{
		"type": []any{"string", "number"},
	},
	"k8s.io/apimachinery/pkg/util/intstr.IntOrString": map[string]any{"type": []any{"string", "integer"}},
	"k8s.io/apimachinery/pkg/apis/meta/v1.Time":       map[string]any{"type": "string"},
	"k8s.io/apimachinery/pkg/apis/meta/v1.MicroTime":  map[string]any{"type": "string"},
	"k8s.io/apimachinery/pkg/apis/meta/v1.Duration":   map[string]any{"type": "string"},
	"k8s.io/apimachinery/pkg/apis/meta/v1.FieldsV1":   map[string]any{"type": "object"},
	"k8s.io/apimachinery/pkg/runtime.RawExtension":    map[string]any{"type": "object"},
}

// String types that allow more values than their constants.
var open = map[string]bool{
	"k8s.io/api/core/v1.SecretType":          true,
	"k8s.io/api/core/v1.ResourceName":        true,
	"k8s.io/api/core/v1.FinalizerName":       true,
	"k8s.io/api/core/v1.PodConditionType":    true,
	"k8s.io/api/core/v1.NodeConditionType":   true,
	"k8s.io/apimachinery/pkg/types.UID":      true,
	"k8s.io/apimachinery/pkg/types.NodeName": true,
}

// named returns a reference to the schema of a type, which it adds to the definitions.
func (from *typesSource) named(importPath, name string, definitions map[string]any) (map[string]any, error) {
	full := importPath + "." + name
	reference := map[string]any{"$ref": "#/$defs/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(full)}
	if _, ok := definitions[full]; ok {
		return reference, nil
	}
	if schema, ok := special[full]; ok {
		definitions[full] = schema
		return reference, nil
	}
	loaded, err := from.load(importPath)
	if err != nil {
		return nil, err
	}
	spec := loaded.types[name]
	if spec == nil {
		return nil, fmt.Errorf("there is no type %s", full)
	}
	definitions[full] = true // a placeholder, for types that contain themselves
	schema, err := from.expression(importPath, loaded.fileOf[name], spec.Type, definitions)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", full, err)
	}
	if values := loaded.constants[name]; schema["type"] == "string" && len(values) > 0 && !open[full] {
		schema["enum"] = values
	}
	definitions[full] = schema
	return reference, nil
}

func (from *typesSource) expression(importPath, file string, expression ast.Expr, definitions map[string]any) (map[string]any, error) {
	switch node := expression.(type) {
	case *ast.Ident:
		switch node.Name {
		case "string":
			return map[string]any{"type": "string"}, nil
		case "bool":
			return map[string]any{"type": "boolean"}, nil
		case "int", "int8", "int16", "int32", "int64", "uint", "uint8", "uint16", "uint32", "uint64":
			return map[string]any{"type": "integer"}, nil
		case "float32", "float64":
			return map[string]any{"type": "number"}, nil
		}
		return from.named(importPath, node.Name, definitions)
	case *ast.SelectorExpr:
		alias, ok := node.X.(*ast.Ident)
		if !ok {
			return nil, fmt.Errorf("unknown form of a type")
		}
		return from.named(from.packages[importPath].imports[file][alias.Name], node.Sel.Name, definitions)
	case *ast.StarExpr:
		return from.expression(importPath, file, node.X, definitions)
	case *ast.ArrayType:
		if element, ok := node.Elt.(*ast.Ident); ok && element.Name == "byte" {
			return map[string]any{"type": "string", "pattern": "^[A-Za-z0-9+/]*={0,2}$"}, nil
		}
		items, err := from.expression(importPath, file, node.Elt, definitions)
		return map[string]any{"type": "array", "items": items}, err
	case *ast.MapType:
		values, err := from.expression(importPath, file, node.Value, definitions)
		return map[string]any{"type": "object", "additionalProperties": values}, err
	case *ast.StructType:
		properties := map[string]any{}
		required := []any{}
		if err := from.fields(importPath, file, node, definitions, properties, &required); err != nil {
			return nil, err
		}
		schema := map[string]any{"type": "object", "properties": properties, "additionalProperties": false}
		if len(required) > 0 {
			schema["required"] = required
		}
		return schema, nil
	}
	return nil, fmt.Errorf("unknown form of a type: %T", expression)
}

// fields adds the fields of a struct, and those of the structs that are embedded in it.
func (from *typesSource) fields(importPath, file string, node *ast.StructType, definitions, properties map[string]any, required *[]any) error {
	for _, field := range node.Fields.List {
		tag := ""
		if field.Tag != nil {
			text, _ := strconv.Unquote(field.Tag.Value)
			tag = reflect.StructTag(text).Get("json")
		}
		name, options, _ := strings.Cut(tag, ",")
		if name == "-" {
			continue
		}
		if name == "" {
			if len(field.Names) > 0 {
				continue // not in JSON
			}
			if err := from.embedded(importPath, file, field.Type, definitions, properties, required); err != nil {
				return err
			}
			continue
		}
		schema, err := from.expression(importPath, file, field.Type, definitions)
		if err != nil {
			return err
		}
		properties[name] = schema
		optional := strings.Contains(options, "omitempty") || strings.Contains(options, "omitzero")
		if field.Doc != nil {
			for _, line := range field.Doc.List {
				if strings.HasPrefix(strings.TrimSpace(strings.TrimPrefix(line.Text, "//")), "+optional") {
					optional = true
				}
			}
		}
		if !optional {
			*required = append(*required, name)
		}
	}
	return nil
}

func (from *typesSource) embedded(importPath, file string, expression ast.Expr, definitions, properties map[string]any, required *[]any) error {
	if pointer, ok := expression.(*ast.StarExpr); ok {
		expression = pointer.X
	}
	target, name := importPath, ""
	switch node := expression.(type) {
	case *ast.Ident:
		name = node.Name
	case *ast.SelectorExpr:
		alias, ok := node.X.(*ast.Ident)
		if !ok {
			return fmt.Errorf("unknown form of an embedded type")
		}
		target, name = from.packages[importPath].imports[file][alias.Name], node.Sel.Name
	}
	loaded, err := from.load(target)
	if err != nil {
		return err
	}
	spec := loaded.types[name]
	if spec == nil {
		return fmt.Errorf("there is no type %s.%s", target, name)
	}
	embedded, ok := spec.Type.(*ast.StructType)
	if !ok {
		return fmt.Errorf("%s.%s is no struct", target, name)
	}
	return from.fields(target, loaded.fileOf[name], embedded, definitions, properties, required)
}

// removal parses a method APILifecycleRemoved, which returns the version that no longer serves a kind.
func removal(function *ast.FuncDecl) (kind string, minor int, ok bool) {
	if function.Name.Name != "APILifecycleRemoved" || function.Recv == nil {
		return "", 0, false
	}
	pointer, ok := function.Recv.List[0].Type.(*ast.StarExpr)
	if !ok {
		return "", 0, false
	}
	receiver, ok := pointer.X.(*ast.Ident)
	if !ok {
		return "", 0, false
	}
	for _, statement := range function.Body.List {
		if result, ok := statement.(*ast.ReturnStmt); ok && len(result.Results) == 2 {
			if literal, ok := result.Results[1].(*ast.BasicLit); ok {
				minor, err := strconv.Atoi(literal.Value)
				return receiver.Name, minor, err == nil
			}
		}
	}
	return "", 0, false
}
