"""One file a stage. Each takes a Run and returns the Artifact that it made or found."""
