// A TLS server that cheats: tls_server CERT-FILE forged|KEY-FILE [junk]. It prints its port, and answers nothing after the
// handshake. "forged" has another key than the certificate's, "junk" shows three bytes of junk behind the certificate.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	chain := [][]byte{block(os.Args[1])}
	if len(os.Args) > 3 {
		chain = append(chain, []byte{0, 0, 0})
	}
	var key any
	var err error
	if os.Args[2] == "forged" {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	} else {
		key, err = x509.ParsePKCS8PrivateKey(block(os.Args[2]))
	}
	check(err)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		NextProtos:   []string{"h2"},
		Certificates: []tls.Certificate{{Certificate: chain, PrivateKey: key}},
	})
	check(err)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	for {
		connection, err := listener.Accept()
		check(err)
		go io.Copy(io.Discard, connection)
	}
}

func block(path string) []byte {
	text, err := os.ReadFile(path)
	check(err)
	first, _ := pem.Decode(text)
	return first.Bytes
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
