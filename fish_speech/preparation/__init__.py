"""Recordings in, a data set of short transcribed clips out."""
