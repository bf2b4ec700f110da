"""Files of rows."""

import json


def save_rows(path, rows):
    """Write JSON lines; return the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
