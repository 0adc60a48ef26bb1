"""certctl: reads the API server like any user; no private door into the controller."""
