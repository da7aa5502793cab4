"""One file a family of tasks."""
