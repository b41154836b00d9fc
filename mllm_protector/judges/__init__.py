"""Judges: who says whether an answer does harm. None of them sees the image.

``KeywordJudge`` looks for refusals, ``ChatJudge`` asks a chat model, ``GuardModelJudge`` asks a model made
for moderation, ``ModerationJudge`` an endpoint for it, and ``DetectorJudge`` a harm detector;
``ReplayedVerdicts`` repeats what another guard said.
"""
