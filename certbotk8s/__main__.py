"""`python -m certbotk8s` runs the controller."""

from certbotk8s.main import main

if __name__ == "__main__":
    main()
