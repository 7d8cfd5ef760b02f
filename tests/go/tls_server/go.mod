module lbcsi/tests/tls_server

go 1.21
