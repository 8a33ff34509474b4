"""Programs in other processes and environments: virtual environments with lock files, servers, their exit reasons."""
