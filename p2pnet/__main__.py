"""`python -m p2pnet` is `p2pnet`."""

from p2pnet.cli import main

if __name__ == "__main__":
    main()
