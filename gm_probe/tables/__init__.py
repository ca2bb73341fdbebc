"""Runs of many kinds, read into one typed table: run folders, spreadsheets, trackers. Imports no torch, no scipy."""
