"""SGLang's scheduler with our plan in it, in rooms: `scheduler` above `kv`, `latency` and `report`, those above `requests`.

Decides nothing itself: it shows `core` what is, and does what the plan says. May import SGLang, server, observe, estimator.
Always: whatever raises in here, the iteration is stock SGLang's and every request is in exactly one place.
"""
