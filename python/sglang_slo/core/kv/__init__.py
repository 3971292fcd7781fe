"""KV decisions: who may enter (ledger), who leaves and comes back (relief), which way a victim goes (preemption).

Pure, like all of `core`. Always: what is admitted fits the forecast, and nobody leaves who would not let somebody in.
"""
