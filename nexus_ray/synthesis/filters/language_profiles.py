"""Function words and sample text of the languages that `language` tells apart; small tables of our own.

The samples were written for this file, each on the same everyday matters, and serve only to count letter triples.
"""

from __future__ import annotations

from nexus_ray.config.filters import Language

FUNCTION_WORDS: dict[Language, str] = {
    "en": (
        "a i the of and to in is was that it for on with as at by this be are from have had has not but they his her "
        "she he which you were been would could should there their what when who will more if about into than them "
        "then some these those only other its our your my we me do does did how where while because through after "
        "before again each out up off down over under very can an or so no him us all any such just also said one "
        "two like upon every"
    ),
    "fr": (
        "le la les des du de un une et est en que qui dans pour pas ce cette ces sur avec au aux il elle ils elles "
        "nous vous je tu ne se sont par plus mais ou où son sa ses leur leurs mon ma mes notre votre été était "
        "étaient être avoir avait ont fait comme tout tous toute toutes si sans sous entre même aussi très bien "
        "dont lui eux ni donc or car quand alors encore peut deux après avant chez puis cela ça c'est d l qu n s j "
        "m y rien jamais toujours"
    ),
    "es": (
        "el la los las de del un una unos unas y e en que es por con para no se su sus lo al como más pero fue era "
        "eran ser estar está están este esta estos estas ese esa esos esas aquel ha han había habían hay muy sin "
        "sobre también me te le les nos mi tu yo él ella ellos ellas nosotros usted cuando donde quien qué cómo "
        "porque si ya todo todos toda todas entre hasta desde durante siempre nunca nada algo cada otro otra dos "
        "tiene tenía hacer así"
    ),
    "de": (
        "der die das den dem des ein eine einen einem einer eines und ist in zu von mit auf für nicht sich auch es "
        "an als im am bei nach aus wie wird werden wurde wurden war waren sind sein seine seinen seiner ihr ihre "
        "ihren er sie wir ich du mir mich dir uns euch hat haben hatte hatten aber oder wenn dass weil durch über "
        "unter vor zum zur noch nur schon sehr so man kann konnte muss soll will mehr kein keine dieser diese "
        "dieses immer dann doch was wer wo hier dort um bis ohne gegen zwischen alle alles"
    ),
    "it": (
        "il lo la i gli le di del della dei delle dello degli un uno una e è in che per con non si su al alla ai "
        "alle da dal dalla nel nella nei nelle sul sulla come più ma anche sono era erano essere stato stata stati "
        "ha hanno aveva avevano questo questa questi queste quello quella quelli suo sua suoi sue loro mio mia "
        "nostro io tu lui lei noi voi ci mi ti se ne quando dove chi cosa perché già ancora molto tutto tutti "
        "tutta ogni senza tra fra dopo prima poi sempre mai niente due fatto così dell all nell c l d"
    ),
    "pt": (
        "o a os as de do da dos das um uma uns umas e é em no na nos nas que para por com não se seu sua seus suas "
        "ao aos à às pelo pela pelos pelas como mais mas foi era eram ser estar está estão este esta estes estas "
        "esse essa isso isto aquele aquela há tem têm tinha muito sem sobre também me te lhe lhes meu minha eu ele "
        "ela eles elas você vocês nós quando onde quem porque já ainda todo todos toda todas cada entre até desde "
        "depois antes sempre nunca nada outro outra dois duas fazer assim então só"
    ),
    "nl": (
        "de het een en van in is dat op te met voor niet zijn was er aan om ook als bij door naar uit dan maar nog "
        "wel hij zij ze we wij ik je jij jullie u hem haar hun mijn jouw ons onze die dit deze wat wie waar wordt "
        "werd worden werden heeft hebben had hadden kan kon kunnen moet moeten zal zou zouden over onder tussen "
        "tegen zonder veel meer geen alle alles altijd nooit niets iets toen nu hier daar omdat want of tot al "
        "heel zo ging"
    ),
}
"""The commonest words of each, of all grammatical kinds that say little of the topic."""

LETTERS: dict[Language, str] = {
    "en": "éèêëïöàâç",
    "fr": "àâæçéèêëîïôœùûüÿ",
    "es": "áéíóúüñªº",
    "de": "äöüßé",
    "it": "àèéìíîòóùú",
    "pt": "áâãàçéêíóôõúüªº",
    "nl": "áàâäéèêëíïóôöúüç",
}
"""Letters beyond a-z that are at home in each; many others mean another language."""

SAMPLES: dict[Language, str] = {
    "en": (
        "In the morning the old woman opened the window and looked at the garden. It had rained during the night, "
        "and the leaves of the apple tree were shining. She thought about her children, who lived far away in the "
        "city, and wondered whether they would visit her this summer. Then she made tea, cut a slice of bread and "
        "wrote a long letter. Knowledge grows when people share what they have learned with others. Science "
        "explains how water becomes steam, why the moon changes its shape, and what plants need to grow. Every "
        "year thousands of students leave school without knowing which work they should choose. The government "
        "announced that new houses will be built near the station before the end of next year. You can mix the "
        "flour with sugar and butter, then let it rest for half an hour. Nothing is more important than health, "
        "although many of us forget this while we are young. Where there is light, there must be shadow, the "
        "teacher said quietly. The fisherman brought his boat through the storm, thanks to the help of his "
        "friends."
    ),
    "fr": (
        "Le matin, la vieille femme ouvrit la fenêtre et regarda le jardin. Il avait plu pendant la nuit, et les "
        "feuilles du pommier brillaient. Elle pensait à ses enfants, qui vivaient loin dans la ville, et se "
        "demandait s'ils viendraient la voir cet été. Puis elle prépara du thé, coupa une tranche de pain et "
        "écrivit une longue lettre. Le savoir grandit quand les gens partagent avec les autres ce qu'ils ont "
        "appris. La science explique comment l'eau devient vapeur, pourquoi la lune change de forme et ce dont les "
        "plantes ont besoin pour pousser. Chaque année, des milliers d'élèves quittent l'école sans savoir quel "
        "métier choisir. Le gouvernement a annoncé que de nouvelles maisons seront construites près de la gare "
        "avant la fin de l'année prochaine. On peut mélanger la farine avec le sucre et le beurre, puis laisser "
        "reposer une demi-heure. Rien n'est plus important que la santé, même si beaucoup d'entre nous l'oublient "
        "quand nous sommes jeunes. Là où il y a de la lumière, il doit y avoir de l'ombre, disait doucement le "
        "professeur. Le pêcheur ramena son bateau à travers la tempête grâce à l'aide de ses amis."
    ),
    "es": (
        "Por la mañana la anciana abrió la ventana y miró el jardín. Había llovido durante la noche, y las hojas "
        "del manzano brillaban. Pensaba en sus hijos, que vivían lejos en la ciudad, y se preguntaba si vendrían a "
        "visitarla este verano. Luego preparó té, cortó una rebanada de pan y escribió una carta muy larga. El "
        "conocimiento crece cuando la gente comparte con los demás lo que ha aprendido. La ciencia explica cómo el "
        "agua se convierte en vapor, por qué la luna cambia de forma y qué necesitan las plantas para crecer. Cada "
        "año miles de estudiantes dejan la escuela sin saber qué trabajo deben elegir. El gobierno anunció que se "
        "construirán nuevas casas cerca de la estación antes del final del próximo año. Se puede mezclar la harina "
        "con el azúcar y la mantequilla, y después dejarla reposar media hora. Nada es más importante que la "
        "salud, aunque muchos de nosotros lo olvidamos cuando somos jóvenes. Donde hay luz tiene que haber sombra, "
        "dijo el maestro en voz baja. El pescador llevó su barco a través de la tormenta gracias a la ayuda de sus "
        "amigos."
    ),
    "de": (
        "Am Morgen öffnete die alte Frau das Fenster und blickte in den Garten. In der Nacht hatte es geregnet, "
        "und die Blätter des Apfelbaums glänzten. Sie dachte an ihre Kinder, die weit weg in der Stadt lebten, und "
        "fragte sich, ob sie sie in diesem Sommer besuchen würden. Dann kochte sie Tee, schnitt eine Scheibe Brot "
        "ab und schrieb einen langen Brief. Wissen wächst, wenn Menschen mit anderen teilen, was sie gelernt "
        "haben. Die Wissenschaft erklärt, wie Wasser zu Dampf wird, warum der Mond seine Gestalt ändert und was "
        "Pflanzen zum Wachsen brauchen. Jedes Jahr verlassen Tausende Schüler die Schule, ohne zu wissen, welchen "
        "Beruf sie wählen sollen. Die Regierung kündigte an, dass vor dem Ende des nächsten Jahres neue Häuser in "
        "der Nähe des Bahnhofs gebaut werden. Man kann das Mehl mit Zucker und Butter mischen und es danach eine "
        "halbe Stunde ruhen lassen. Nichts ist wichtiger als die Gesundheit, auch wenn viele von uns das "
        "vergessen, solange wir jung sind. Wo Licht ist, muss auch Schatten sein, sagte der Lehrer leise. Der "
        "Fischer brachte sein Boot durch den Sturm, dank der Hilfe seiner Freunde."
    ),
    "it": (
        "La mattina la vecchia signora aprì la finestra e guardò il giardino. Durante la notte aveva piovuto, e le "
        "foglie del melo brillavano. Pensava ai suoi figli, che vivevano lontano in città, e si chiedeva se "
        "sarebbero venuti a trovarla quell'estate. Poi preparò il tè, tagliò una fetta di pane e scrisse una lunga "
        "lettera. La conoscenza cresce quando le persone condividono con gli altri ciò che hanno imparato. La "
        "scienza spiega come l'acqua diventa vapore, perché la luna cambia forma e di che cosa hanno bisogno le "
        "piante per crescere. Ogni anno migliaia di studenti lasciano la scuola senza sapere quale lavoro "
        "scegliere. Il governo ha annunciato che nuove case saranno costruite vicino alla stazione prima della "
        "fine del prossimo anno. Si può mescolare la farina con lo zucchero e il burro, e poi lasciarla riposare "
        "per mezz'ora. Niente è più importante della salute, anche se molti di noi lo dimenticano quando sono "
        "giovani. Dove c'è luce deve esserci ombra, disse il maestro a bassa voce. Il pescatore portò la barca "
        "attraverso la tempesta grazie all'aiuto dei suoi amici."
    ),
    "pt": (
        "De manhã a velha senhora abriu a janela e olhou para o jardim. Tinha chovido durante a noite, e as folhas "
        "da macieira brilhavam. Pensava nos seus filhos, que viviam longe na cidade, e perguntava-se se viriam "
        "visitá-la neste verão. Depois preparou chá, cortou uma fatia de pão e escreveu uma carta muito longa. O "
        "conhecimento cresce quando as pessoas partilham com os outros aquilo que aprenderam. A ciência explica "
        "como a água se transforma em vapor, por que a lua muda de forma e do que as plantas precisam para "
        "crescer. Todos os anos milhares de alunos deixam a escola sem saber que trabalho devem escolher. O "
        "governo anunciou que novas casas serão construídas perto da estação antes do fim do próximo ano. Pode-se "
        "misturar a farinha com o açúcar e a manteiga, e depois deixá-la descansar meia hora. Nada é mais "
        "importante do que a saúde, embora muitos de nós o esqueçam enquanto são jovens. Onde há luz tem de haver "
        "sombra, disse o professor em voz baixa. O pescador levou o barco através da tempestade graças à ajuda dos "
        "seus amigos. Você não pode ficar aqui, disse ela então ao irmão."
    ),
    "nl": (
        "'s Ochtends deed de oude vrouw het raam open en keek naar de tuin. Het had die nacht geregend, en de "
        "bladeren van de appelboom glansden. Ze dacht aan haar kinderen, die ver weg in de stad woonden, en vroeg "
        "zich af of ze haar deze zomer zouden bezoeken. Daarna zette ze thee, sneed een boterham af en schreef een "
        "lange brief. Kennis groeit wanneer mensen met anderen delen wat ze hebben geleerd. De wetenschap legt uit "
        "hoe water in stoom verandert, waarom de maan van vorm verandert en wat planten nodig hebben om te "
        "groeien. Elk jaar verlaten duizenden leerlingen de school zonder te weten welk werk ze moeten kiezen. De "
        "regering kondigde aan dat er voor het einde van volgend jaar nieuwe huizen bij het station gebouwd zullen "
        "worden. Je kunt het meel met suiker en boter mengen en het daarna een half uur laten rusten. Niets is "
        "belangrijker dan gezondheid, ook al vergeten velen van ons dat zolang we jong zijn. Waar licht is, moet "
        "ook schaduw zijn, zei de leraar zachtjes. De visser bracht zijn boot door de storm, dankzij de hulp van "
        "zijn vrienden."
    ),
}
"""About 180 words of each language, the same content in all."""
