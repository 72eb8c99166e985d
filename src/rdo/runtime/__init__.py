"""What keeps long runs safe: results, parts, processes, signals, files, errors."""
