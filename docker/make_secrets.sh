#!/bin/sh
# Fills the folders /secrets/teacher and /secrets/student: a certificate authority whose key is thrown away, the teacher's
# certificate for the name `teacher`, and a bearer token. What is there and good for 30 days more is left as it is, so
# certificates and a token of your own stay.
set -eu
umask 077
teacher=/secrets/teacher student=/secrets/student
if ! openssl x509 -in "$teacher/tls.crt" -noout -checkend 2592000 >/dev/null 2>&1 || [ ! -s "$student/ca.crt" ]; then
  work=$(mktemp -d)
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 365 -subj "/CN=logitstream" \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign" \
    -keyout "$work/ca.key" -out "$work/ca.crt"
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj "/CN=teacher" \
    -keyout "$work/tls.key" -out "$work/tls.csr"
  printf 'subjectAltName=DNS:teacher,DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n' >"$work/tls.ext"
  openssl x509 -req -in "$work/tls.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" -CAcreateserial -days 365 \
    -extfile "$work/tls.ext" -out "$work/tls.crt"
  cp "$work/tls.key" "$work/tls.crt" "$teacher/"
  cp "$work/ca.crt" "$student/"
  rm -r "$work"
fi
if ! cmp -s "$teacher/token" "$student/token"; then
  [ -s "$student/token" ] || openssl rand -hex 32 >"$student/token"
  cp "$student/token" "$teacher/token"
fi
