"""`python -m endor`: the command line."""

from endor.cli.main import main

main()
