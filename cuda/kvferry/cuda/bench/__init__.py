"""Measurements of the staging path, each against the raw limit of the link in the same run.

``python -m kvferry.cuda.bench`` runs them; they need a GPU, and without one nothing is printed as a figure.
"""
