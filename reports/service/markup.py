"""The template and style of the list of runs."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ground: #fff; --raised: #f5f7f9; --ink: #1a2027; --soft: #55606c; --line: #d6dce2;
  --link: #0b62a8; --warn: #fff3d6; --warn-ink: #5c3d00; --good: #dff3e6; --good-ink: #11512c; }
@media (prefers-color-scheme: dark) { :root { --ground: #13171c; --raised: #1b2128; --ink: #e4e9ee; --soft: #a3aeb9;
  --line: #343d47; --link: #7cc0f5; --warn: #40310f; --warn-ink: #ffdf9c; --good: #14361f; --good-ink: #a8e6bd; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem clamp(0.8rem, 3vw, 2rem) 3rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 0.6rem; }
h2 { font-size: 1.1rem; margin: 0 0 0.4rem; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
article { border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.8rem 1rem; margin: 0.8rem 0; }
.state { font-size: 0.8rem; font-weight: 600; padding: 0.15rem 0.6rem; border-radius: 1rem; background: var(--warn);
  color: var(--warn-ink); }
.state.complete { background: var(--good); color: var(--good-ink); }
.warning { background: var(--warn); color: var(--warn-ink); padding: 0.4rem 0.8rem; border-radius: 0.4rem;
  margin: 0.4rem 0; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 0.4rem 1.2rem;
  margin: 0.4rem 0; }
dl > div { min-width: 0; }
dt { color: var(--soft); font-size: 0.82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0.3rem 0; padding-left: 1.2rem; }
li { overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--link); }
"""

LIST: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs</title>
<link rel="icon" href="data:,">
<style>{{ style }}</style>
</head>
<body>
<h1>Runs</h1>
{% if not complete %}
<p class="warning" role="status">There are more folders than are looked at; serve a folder further down.</p>
{% endif %}
{% if not runs %}
<p>There is no sweep, campaign or training folder here.</p>
{% endif %}
{% for run in runs %}
<article id="run-{{ loop.index }}">
<h2>{% if run.page %}<a href="{{ run.link }}">{{ run.id }}</a>{% else %}{{ run.id }}{% endif %} {{ run.kind }}
<span class="state {{ run.state }}">{{ run.state }}</span></h2>
{% for line in run.warnings %}
<p class="warning">{{ line }}</p>
{% endfor %}
{% if run.facts %}
<dl>
{% for name, value in run.facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<p><a href="{{ run.link }}manifest.json">manifest.json</a>
{%- if run.against %}, <a href="{{ run.link }}{{ run.against }}">comparison</a>{% endif %}
{%- for plan in run.plans %}, {% if plan.problem %}plan {{ plan.name }} ({{ plan.problem }})
{%- else %}<a href="{{ run.link }}plans/{{ plan.name | urlencode }}.json" download>plan {{ plan.name }}</a>{% endif %}
{%- endfor %}
{%- if not run.page %}, no page{% endif %}</p>
{% endif %}
{% if run.files %}
<details><summary>{{ run.files | length }} Parquet {{ "file" if run.files | length == 1 else "files" }}</summary>
<ul>
{% for file in run.files[:200] %}
{% if file.problem %}
<li>{{ file.path }}: {{ file.problem }}</li>
{% else %}
<li><a href="{{ run.link }}tables/{{ file.path | urlencode }}" download>{{ file.path }}</a>,
{{ file.rows }} rows, {{ file.size }} bytes</li>
{% endif %}
{% endfor %}
{% if run.files | length > 200 %}
<li>and {{ run.files | length - 200 }} more; the JSON form of this page has them all</li>
{% endif %}
</ul>
</details>
{% endif %}
</article>
{% endfor %}
</body>
</html>
"""
