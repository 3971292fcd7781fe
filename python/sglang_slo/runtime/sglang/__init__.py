"""What differs between the versions of SGLang that are served, and nothing else.

Decides nothing. May import SGLang alone.
Always: no other module asks which version this is.
"""
