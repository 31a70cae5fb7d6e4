"""Turns results into tables, figures and pages."""
