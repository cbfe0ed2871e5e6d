"""What pytest must not import by itself here: it needs torch."""

collect_ignore = ['reference.py']
