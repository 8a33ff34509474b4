"""The command line: what each command prints, and the exit codes."""
