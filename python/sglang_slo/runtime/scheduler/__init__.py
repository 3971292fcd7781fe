"""What SGLang's scheduler does differently here: view, plan, apply, and one message that lets all ranks do the same.

Decides in which order SGLang's own steps are called, never who is served. May import every other room of `runtime`.
Always: no rank reads a clock for a decision, and a plan that raises leaves the iteration to stock scheduling.
"""
