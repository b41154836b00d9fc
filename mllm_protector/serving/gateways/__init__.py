"""The guard for gateways of others: their protocols, translated to questions and answers.

A gateway asks for a verdict, and puts it into effect itself. All that the guard judges here are answers.
"""
