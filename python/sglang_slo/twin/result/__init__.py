"""What a run was, as plain arrays, and how it is told: measures, tables, spread over seeds.

Decides nothing. May import core alone.
Always: every figure follows from the arrays, by the rules that the server judges by.
"""
