"""What differs between the releases of SGLang that are supported, and nothing else.

What a request holds (`kv`), what the prefix tree keeps of it (`tree`), how a scheduler is built and its place among the
ranks (`process`), what a speculative decode takes (`speculation`), what SGLang made of its settings (`settings`),
which releases are accepted at all (`supported`).
Which of two ways a release goes is read off SGLang itself, never off its version.

Decides nothing. May import SGLang alone.
Always: no other module asks which version this is.
"""
