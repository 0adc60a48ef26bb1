// Package ext stands in for the extension points of Traefik's dynamic configuration, which the lab does not use.
package ext

// HTTP adds nothing to the HTTP configuration.
type HTTP struct{}

// DeepCopyInto copies nothing.
func (in *HTTP) DeepCopyInto(out *HTTP) {}

// Router adds nothing to a router.
type Router struct{}

// DeepCopyInto copies nothing.
func (in *Router) DeepCopyInto(out *Router) {}
