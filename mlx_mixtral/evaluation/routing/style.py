"""The style sheet of a routing page: light and dark as the reader's system is, from a phone's width up."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{--paper:#fff;--text:#1b1f24;--soft:#59636e;--line:#d8dee4;--card:#f6f8fa;--accent:#0b57a4;--hi:#2166ac;--lo:#d6604d}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--text:#e6e9ec;--soft:#9aa4ae;--line:#343b43;--card:#1d2228;
--accent:#7db8f0;--hi:#6aaee8;--lo:#e88a76}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1rem 1rem 3rem}
h1{font-size:1.7rem;margin:.5rem 0 0;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2.6rem 0 .3rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}p{margin:.3rem 0 .8rem;max-width:48rem}header p{color:var(--soft)}
a{color:var(--accent)}small,.theirs{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1rem 0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.cards b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
.cards span{color:var(--soft);font-size:.85rem;line-height:1.3;display:block}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
.charts.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,9.5rem),1fr))}
figure{margin:0;max-width:34rem}figcaption{font-weight:600;font-size:.9rem;margin-bottom:.2rem}
figure p{font-size:.85rem;color:var(--soft);margin:.2rem 0}
.chart{display:block;width:100%;height:auto;stroke-linejoin:round}
.chart text{font-family:system-ui,sans-serif!important}
.key{display:inline-block;width:1em;height:1em;border-radius:3px;vertical-align:-.15em}
.key{opacity:.75}.key.hi{background:var(--hi)}.key.lo{background:var(--lo)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.4rem 0 .8rem;font-size:.9rem}
.legend i{font-style:normal;margin-right:.35rem;letter-spacing:-.1em}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;white-space:nowrap}
caption{text-align:left;font-weight:600;padding-bottom:.3rem;position:sticky;left:0}
th,td{padding:.25rem .75rem .25rem 0;text-align:right}
th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
thead th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
tbody th{font-weight:500}tbody tr:last-child>*{border-top:1px solid var(--line)}
summary{cursor:pointer;margin-top:1rem}li{margin:.2rem 0}
#text input{position:absolute;opacity:0;pointer-events:none}
.pick{position:sticky;top:0;z-index:1;background:var(--paper);border-bottom:1px solid var(--line);padding:.5rem 0;display:flex;
flex-wrap:wrap;gap:.4rem;align-items:center}
.pick label{border:1px solid var(--line);border-radius:99px;padding:.15rem .8rem;cursor:pointer;font-size:.9rem}
.numbers:checked~.pick [for=numbers]{background:var(--accent);color:var(--paper)}
.numbers:focus-visible~.pick [for=numbers]{outline:2px solid var(--text)}
.experts{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem;padding:0;margin:0 0 0 .4rem;font-size:.85rem;
align-items:center}
.experts li{margin:0}.experts i{display:inline-block;
min-width:1.6em;text-align:center;font-style:normal;color:#111;border-radius:4px}
.text{columns:2 30rem;column-gap:2rem}.text>div{break-inside:avoid;padding-bottom:1rem}.text h3{margin-top:0;padding-top:.6rem}
.text p{max-width:none;white-space:pre-wrap;overflow-wrap:anywhere;font:.84rem/1.75 ui-monospace,SFMono-Regular,Menlo,monospace}
.text b{font-weight:400;color:#111;border-radius:3px;padding:.12em 0;margin-right:1px;unicode-bidi:isolate;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.text b::after{font-size:.62em;vertical-align:super;font-weight:700}
.text s{text-decoration:none;opacity:.45}
@media print{.pick{position:static}}
"""
