// A Go client of today: grpc-go 1.76, which sends GOAWAY when it closes a connection, as kubelet does after each call.
//
//	new_client <socket path> <calls per connection> <connections>
//
// Prints one line per call, and exits 1 at the first that fails.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// rawCodec sends and receives bytes, so that no generated code is needed.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return *(v.(*[]byte)), nil }

func (rawCodec) Unmarshal(data []byte, v any) error {
	*(v.(*[]byte)) = append([]byte(nil), data...)
	return nil
}

func (rawCodec) Name() string { return "proto" }

func main() {
	path := os.Args[1]
	calls, _ := strconv.Atoi(os.Args[2])
	connections, _ := strconv.Atoi(os.Args[3])
	for n := 1; n <= connections; n++ {
		if err := probe(path, calls, n); err != nil {
			fmt.Fprintf(os.Stderr, "connection %d: %v\n", n, err)
			os.Exit(1)
		}
	}
}

func probe(path string, calls, n int) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	connection, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
	if err != nil {
		return err
	}
	defer connection.Close()
	for call := 1; call <= calls; call++ {
		var request, reply []byte
		if err := connection.Invoke(ctx, "/csi.v1.Identity/Probe", &request, &reply); err != nil {
			return err
		}
		fmt.Printf("connection %d call %d: %x\n", n, call, reply)
	}
	return nil
}
