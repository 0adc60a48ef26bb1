// The ingress controller of the lab. Replacements and exclusions are those of Traefik's own go.mod, which do not
// apply when it is a dependency; dynamic/ext is never published, so ext/ stands in for it.
module certbotk8s.io/lab/traefik

go 1.26.0

require github.com/traefik/traefik/v3 v3.7.9

replace (
	github.com/abbot/go-http-auth => github.com/containous/go-http-auth v0.4.1-0.20200324110947-a37a7636d23e
	github.com/gorilla/mux => github.com/containous/mux v0.0.0-20250523120546-41b6ec3aed59
	github.com/traefik/traefik/dynamic/ext => ./ext
)

exclude github.com/tencentcloud/tencentcloud-sdk-go v3.0.83+incompatible
