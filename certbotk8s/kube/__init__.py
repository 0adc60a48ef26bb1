"""The API server: thin REST layer, list and watch, stores, Events."""
