"""certbotk8s: an ACME certificate manager for Kubernetes with External Account Binding."""

__version__ = "0.1.0"
