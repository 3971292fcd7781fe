"""What becomes of a request, and how it is told: judged, counted over windows, as status, page, metrics and log.

Decides whether a request attained what it declared. May import core, config and, to answer over HTTP, SGLang.
Always: the judge reads the times that the scheduler reads, and what raises in here costs a report, never a request.
"""
