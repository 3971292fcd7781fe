"""What all rooms know of SGLang's requests and batches: rows of the table, features, lengths, splitting and joining.

Decides what may be done to a request, by the features it uses. May import core, estimator, server.limits and SGLang.
Always: a row lives as long as its request, and a batch that is taken apart stays whole until the new one is.
"""
