// The ACME server of the lab, and the DNS server that its validations ask.
module certbotk8s.io/lab/pebble

go 1.26.0

require github.com/letsencrypt/pebble/v2 v2.10.1
