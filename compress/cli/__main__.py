"""`python -m compress.cli`: the command line without its installed script."""

from compress.cli.main import main

main()
