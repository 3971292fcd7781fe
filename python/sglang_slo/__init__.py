"""SGLang with deadlines: SGLang whose scheduler keeps time-to-first-token and time-between-tokens limits."""

__version__ = "0.2.0"
