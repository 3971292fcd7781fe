"""SGLang on a plain CPU: a platform, its allocator, attention at the cost it should have, and a tiny demo model.

Decides nothing about requests. Imports SGLang and torch, and nothing of ours.
Always: no deadline is known in here, and a machine with an accelerator never comes here.
"""
