"""How long an output will be: features at arrival, a model that learns while serving, bounds that hold; see `service`.

Decides nothing about requests: a prediction is advice. May import core and config, and no engine.
Always: whatever goes wrong costs a level of prediction, never a request, and no true length is known before its end.
"""
