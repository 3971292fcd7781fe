"""Measurements on one GPU, in parts of under nine minutes: stock SGLang and ours, alternating."""
