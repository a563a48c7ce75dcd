"""Scores of generated images against real ones, from features of both."""
