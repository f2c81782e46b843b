from .cli import main

if __name__ == "__main__":  # a process that main starts reads this file too
    raise SystemExit(main())
