// A Go client as Kubernetes 1.17 to 1.25 has them: grpc-go 1.29, which takes the :authority from the dial target.
// With a dialer of its own, the target is the plain path of the socket, and that is what goes over the wire.
//
//	old_client <socket path> <calls per connection> <connections>
//
// Prints one line per call, and exits 1 at the first that fails.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
)

// rawCodec sends and receives bytes, so that no generated code is needed.
type rawCodec struct{}

func (rawCodec) Marshal(v interface{}) ([]byte, error) { return *(v.(*[]byte)), nil }

func (rawCodec) Unmarshal(data []byte, v interface{}) error {
	*(v.(*[]byte)) = append([]byte(nil), data...)
	return nil
}

func (rawCodec) String() string { return "proto" }

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
	connection, err := grpc.DialContext(ctx, path, grpc.WithInsecure(), grpc.WithBlock(), grpc.WithCodec(rawCodec{}),
		grpc.WithContextDialer(func(ctx context.Context, target string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", target)
		}))
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
