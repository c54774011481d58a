"""``report.html``: one self-contained page made of a run folder and of nothing else."""

from __future__ import annotations

from jinja2 import Environment, StrictUndefined

from mulki.metrics import DEFINITIONS
from mulki.report.folder import RunData
from mulki.report.tables import (
    TITLES,
    class_incremental_lines,
    display_columns,
    display_rows,
    format_metrics,
)

# One hue that grows stronger with the accuracy: read alike with any colour vision and in grey,
# and light enough at 100 percent for black figures.
_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; max-width: 75rem;
  color: #111; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; } tbody th { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.learned { outline: 2px solid #111; outline-offset: -2px; font-weight: 700; }
td.other { font-style: italic; }
tr.note { color: #555; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>Status: <strong>{{ status }}</strong>{% if facts %}; {{ facts }}{% endif %}</p>

<h2>Metrics</h2>
<table>
<thead><tr><th></th><th class="number">run</th>
{%- if has_zero_shot %}<th class="number">zero-shot</th>{% endif %}<th>definition</th></tr></thead>
<tbody>
{%- for title, values, definition in metrics %}
<tr><th>{{ title }}</th>
{%- for value in values %}<td class="number">{{ value }}</td>{% endfor %}
<td>{{ definition }}</td></tr>
{%- endfor %}
</tbody>
</table>
<p>In percent, over the learned tasks only.
{%- if has_zero_shot %} The column zero-shot is a model that never changed.{% endif %}</p>
{%- for line in class_incremental %}
<p>{{ line }}</p>
{%- endfor %}

<h2>Accuracy after each task</h2>
<div class="scroll"><table>
<thead><tr><th>after</th>
{%- for column in columns %}<th class="number">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row, cells in rows %}
<tr><th>{{ row }}</th>
{%- for value, kind in cells %}
<td class="number {{ kind }}" style="background: rgba(31, 119, 180, {{ '%.3f' % (value * 0.007) -}}
)">{{ '%.1f' % value }}</td>
{%- endfor %}</tr>
{%- endfor %}
{%- if test_images %}
<tr class="note"><th>test images</th>
{%- for column in columns %}<td class="number">{{ test_images.get(column, '') }}</td>{% endfor %}
</tr>
{%- endif %}
</tbody>
</table></div>
<p>Top-1 accuracy in percent. Framed: just learned; upright: learned earlier; italic: not learned
by then.</p>
{% if config %}
<h2>Configuration</h2>
<pre>{{ config }}</pre>
{% endif %}
{%- if environment %}
<h2>Environment</h2>
<table><tbody>
{%- for key, value in environment.items() %}
<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</tbody></table>
{% endif -%}
</body>
</html>
"""


def render_html(run: RunData) -> str:
    """Return the page for a run; it needs no network and no other file."""
    matrix, summary = run.matrix, run.summary
    facts = [f"{key} {summary[key]}" for key in ("method", "order", "seed") if key in summary]
    if "seconds" in summary:
        facts.append(f"{summary['seconds']:.0f} s")
    zero_shot = matrix.zero_shot_metrics()
    columns = [format_metrics(values) for values in (matrix.metrics(), zero_shot) if values]
    metrics = [
        (title, [column[index] for column in columns], DEFINITIONS[key])
        for index, (key, title) in enumerate(TITLES.items())
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        name=run.name,
        status=run.status,
        facts=", ".join(facts),
        has_zero_shot=zero_shot is not None,
        metrics=metrics,
        class_incremental=class_incremental_lines(run.class_incremental),
        columns=display_columns(matrix),
        rows=list(display_rows(matrix)),
        test_images=summary.get("test_images", {}),
        config=run.config,
        environment=_flat(run.environment),
    )


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        items = [
            _flat(item, f"{prefix}: {key}" if prefix else str(key)) for key, item in value.items()
        ]
        return {name: text for item in items for name, text in item.items()}
    if isinstance(value, list):
        return {prefix: ", ".join(map(str, value)) or "-"}
    return {prefix: "-" if value is None else str(value)}
