"""What drives the reconcilers: work queue, workers, pools, timer, health. Knows keys, never objects."""
