"""Limits on their way in: read from body, headers and classes, checked, carried to the scheduler; refusals on their way out.

Decides what a request declared and whether that can be read. May import observe, config, core and SGLang.
Always: nothing that a client sends is taken for the server's own word, and what cannot be read is a 400 naming the field.
"""
